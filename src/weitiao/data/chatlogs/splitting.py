"""The conversations of one chat → those to learn from and those held out, so that no message is in both.

With times, the latest conversations are held out, and no session is cut in two. Without times (JSON exports) the order
says nothing, and windows that slid over a chat share messages: there a connected part is held out, and what shares
messages with it is dropped.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from .turns import Conversation, Tally


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatSplit:
    """Conversations of one chat on two sides."""

    train: tuple[Conversation, ...]
    dev: tuple[Conversation, ...]


def split_chat(conversations: Sequence[Conversation], *, held_out: float, tally: Tally) -> ChatSplit:
    """Both sides of one chat: about `held_out` of its replies, and at least one session, are held out.

    A chat of a single session stays whole, on the side to learn from. Conversations that are dropped here, because they
    share messages with the held-out part, are counted in `tally`.
    """
    if all(conversation.start is not None for conversation in conversations):
        return _split_by_time(conversations, held_out)
    return _split_by_overlap(conversations, held_out, tally)


def _split_by_time(conversations: Sequence[Conversation], held_out: float) -> ChatSplit:
    sessions: defaultdict[int, list[Conversation]] = defaultdict(list)
    for conversation in conversations:
        sessions[conversation.session].append(conversation)
    in_order = list(sessions.values())
    sizes = [sum(conversation.num_replies for conversation in session) for session in in_order]
    first = len(in_order)
    if held_out > 0 and len(in_order) > 1:
        wanted = held_out * sum(sizes)
        # Of all places to cut, the one that comes nearest to the share; of two, the later.
        first = min(range(len(in_order) - 1, 0, -1), key=lambda start: abs(sum(sizes[start:]) - wanted))
    return ChatSplit(
        train=tuple(conversation for session in in_order[:first] for conversation in session),
        dev=tuple(conversation for session in in_order[first:] for conversation in session),
    )


def _split_by_overlap(conversations: Sequence[Conversation], held_out: float, tally: Tally) -> ChatSplit:
    """A connected part of the graph of shared messages, grown from the last conversation, is held out."""
    neighbours = _find_overlaps(conversations)
    wanted = held_out * sum(conversation.num_replies for conversation in conversations)
    dev: set[int] = set()
    size = 0
    waiting: deque[int] = deque()
    candidates = list(range(len(conversations)))  # the last is taken first
    while held_out > 0 and size < wanted and len(dev) < len(conversations) - 1:
        if not waiting:
            while candidates[-1] in dev:
                candidates.pop()
            waiting.append(candidates.pop())
        index = waiting.popleft()
        if index in dev:
            continue
        dev.add(index)
        size += conversations[index].num_replies
        waiting.extend(sorted(neighbours[index] - dev))
    between = {near for index in dev for near in neighbours[index]} - dev
    if len(dev) + len(between) == len(conversations):  # nothing would be left to learn from
        dev, between = set(), set()
    for index in sorted(between):
        tally.drop(conversations[index], "shares messages with the held-out part")
    return ChatSplit(
        train=tuple(each for index, each in enumerate(conversations) if index not in dev | between),
        dev=tuple(each for index, each in enumerate(conversations) if index in dev),
    )


def _find_overlaps(conversations: Sequence[Conversation]) -> list[set[int]]:
    """For each conversation, those that share messages with it: two pieces in a row, or one of at least 8 characters.

    A piece is what stands between the line ends and commas with which exporters join messages; turns at the edge of a
    window lack some of them.
    """
    holders: defaultdict[object, set[int]] = defaultdict(set)
    for index, conversation in enumerate(conversations):
        pieces = [
            (turn.role, piece.strip())
            for turn in conversation.turns
            for piece in re.split(r"[\n，]", turn.text)
            if piece.strip()
        ]
        for piece in pieces:
            if len(piece[1]) >= 8:
                holders[piece].add(index)
        for pair in itertools.pairwise(pieces):
            holders[pair].add(index)
    neighbours: list[set[int]] = [set() for _ in conversations]
    for its in holders.values():
        for index in its:
            neighbours[index] |= its
    for index, near in enumerate(neighbours):
        near.discard(index)
    return neighbours
