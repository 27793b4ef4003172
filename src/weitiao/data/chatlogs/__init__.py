"""Exported chat logs → conversations for a persona; nothing about tokens or torch."""

from .importing import import_chats
from .settings import ImportSettings
from .summary import ImportSummary

__all__ = ["ImportSettings", "ImportSummary", "import_chats"]
