"""Labelled rows → validated records; nothing about tokens or torch."""

# What a row becomes, and which shapes of rows are understood
from weitiao.data.formats import FORMATS, recognise_format
from weitiao.data.options import ReadOptions
from weitiao.data.raw_rows import RowCount
from weitiao.data.record import Record, Target

# From files
from weitiao.data.records import digest_records, iter_records_or_problems, read_records

__all__ = [
    "FORMATS",
    "ReadOptions",
    "Record",
    "RowCount",
    "Target",
    "digest_records",
    "iter_records_or_problems",
    "read_records",
    "recognise_format",
]
