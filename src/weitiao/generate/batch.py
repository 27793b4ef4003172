"""The rows that are generating together, stepped from outside: join, step, leave, at any time and in any order.

Each row has its own settings, limit, constraint and random numbers, so what it answers does not depend on its
neighbours beyond rounding. Knows torch and transformers models; knows nothing of text, queues or threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import ModelError
from .attention import Chunk, Chunks, attending_by_rows
from .cache import SlabCache
from .heads import BLOCK, HeadStore, num_alike
from .row import Generation, Row
from .sampling import choose_tokens

LEAST_SHARE = BLOCK
"""Fewer tokens are not worth copying."""


class Batch:
    """The rows that are generating; row i of `rows` lies in row i of the cache."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        past_states: tuple[Tensor, Tensor] | None = None,
        exact: bool = False,
        heads: HeadStore | None = None,
        owner: str = "",
    ) -> None:
        """
        Args:
            model: in evaluation mode; whoever steps the batch sees to it that its adapter is the rows' own.
            past_states: learnt keys and values that stand before every row (`models.ptuning.prefix_states`).
            exact: round as one row alone does, see `generate`.
            heads: where beginnings of prompts are kept and found; none: every row computes its own.
            owner: under which name.
        """
        self.model = model
        self.exact = exact
        self.rows: list[Row] = []
        self.cache = SlabCache(model.config.get_text_config().num_hidden_layers, past_states)
        self.heads = heads
        self.owner = owner

    def join(self, row: Row) -> Generation | None:
        """Take `row` in, what it shares with others copied; its answer where the grammar leaves nothing to ask for."""
        ended = row.start()
        if ended is not None:
            return ended
        if self._shares(row):
            self._copy_beginning(row)
        self.rows.append(row)
        return None

    @torch.inference_mode()
    def leave(self, row: Row) -> None:
        """Let `row`, which has not ended, go."""
        self._remove(self.rows.index(row))

    @torch.inference_mode()
    def step(self, *, capacity: int, most_tokens: int | None = None) -> list[Generation]:
        """Call the model once and choose a token for every row; returns those that ended, which have left.

        Args:
            capacity: the number of rows to set cache aside for.
            most_tokens: prompts are computed in parts, so that a step has no more tokens than this, as far as each row
                gets one at least and contexts stay whole; None: in one step each.
        """
        with attending_by_rows(self.model):
            if not self.exact:
                counts = self._shares_of(most_tokens)
                ready = [place for place, row in enumerate(self.rows) if counts[place] == len(row.pending)]
                logits = self._forward(0, counts, capacity)
                return self._choose(ready, logits if len(ready) == len(counts) else logits[ready])
            old = sum(row.num_cached > 0 for row in self.rows)  # those that have just joined stand behind the others
            parts = [self._forward(0, [1] * old, capacity)] if old else []
            parts += [
                self._forward(place, [self.rows[place].num_prompt], capacity) for place in range(old, len(self.rows))
            ]
            ready = [place for place, row in enumerate(self.rows) if not row.pending]
            return self._choose(ready, torch.cat(parts)[ready]) if ready else []

    @torch.inference_mode()
    def trim(self, *, capacity: int) -> None:
        """Give back cache that the rows do not need any more; `capacity` as in `step`, 0 when there is no row."""
        longest = max((row.num_cached + len(row.pending) for row in self.rows), default=0)
        self.cache.shrink(num_rows=capacity, num_tokens=longest)

    def coming_share(self, prompt: Sequence[int]) -> bool:
        """Whether a row is about to compute a beginning of `prompt` that could not be copied yet."""
        if self.heads is None:
            return False
        most = len(prompt) - 1
        alike = {row: min(num_alike(prompt, row.prompt), most) for row in self.rows if row.in_prompt}
        soon = max(alike.values(), default=0)
        if soon < LEAST_SHARE + max((min(count, row.num_cached) for row, count in alike.items()), default=0):
            return False
        if soon < LEAST_SHARE + BLOCK * len(self.heads.find(self.owner, prompt, most=most)):
            return False
        return soon >= LEAST_SHARE + max(num_alike(prompt[:soon], row.known(row.num_cached)) for row in self.rows)

    # --- Sharing -----------------------------------------------------------------------------------------------------

    def _shares(self, row: Row) -> bool:
        """Whether a beginning of `row` may be another's: not where every token of a context sees all of it."""
        return self.heads is not None and not self.exact and row.prefix is None

    @torch.inference_mode()
    def _copy_beginning(self, row: Row) -> None:
        """Copy the longest beginning of the prompt that a row of the batch or the store has; never its last token."""
        assert self.heads is not None
        most, place = row.num_prompt - 1, len(self.rows)
        live, source = 0, 0
        for other, neighbour in enumerate(self.rows):
            if neighbour.num_cached > live:
                alike = num_alike(row.prompt[:most], neighbour.known(min(most, neighbour.num_cached)))
                live, source = max((live, source), (alike, other))
        blocks = self.heads.find(self.owner, row.prompt, most=most)
        if max(live, BLOCK * len(blocks)) < LEAST_SHARE:
            return
        row.num_cached = row.num_shared = max(live, BLOCK * len(blocks))
        del row.pending[: row.num_cached]
        self.cache.reserve(num_rows=place + 1, num_tokens=row.num_prompt)
        if live >= BLOCK * len(blocks):
            self.cache.move_row(source, place, live)
            self.heads.num_hits += 1
            self.heads.num_tokens += live
        else:
            self.cache.write_row(place, 0, self.heads.take(blocks))

    @torch.inference_mode()
    def _keep_beginning(self, place: int) -> None:
        row = self.rows[place]
        if self.heads is not None and self._shares(row) and row.num_cached >= BLOCK:
            known = row.known(row.num_cached)
            self.heads.keep(self.owner, known, lambda start, end: self.cache.read_row(place, start, end))

    # --- A step ------------------------------------------------------------------------------------------------------

    def _shares_of(self, most_tokens: int | None) -> list[int]:
        """How many of its pending tokens each row brings: all, but prompts only as many as `most_tokens` leaves them.

        Prompts share evenly what is left, so a short one is not kept waiting by a long one.
        """
        counts = [len(row.pending) for row in self.rows]
        if most_tokens is None or sum(counts) <= most_tokens:
            return counts
        whole = [not row.in_prompt or (row.prefix is not None and not row.num_cached) for row in self.rows]
        left = most_tokens - sum(count for count, all_of_it in zip(counts, whole, strict=True) if all_of_it)
        parts = sorted((count, place) for place, count in enumerate(counts) if not whole[place])
        for rank, (count, place) in enumerate(parts):
            counts[place] = min(count, max(1, left // (len(parts) - rank)))
            left -= counts[place]
        return counts

    def _forward(self, top: int, counts: Sequence[int], capacity: int) -> Tensor:
        """Feed each row from `top` on so many of its pending tokens; logits ``[R, V]`` after the last of each."""
        rows = self.rows[top : top + len(counts)]
        chunks = Chunks(
            top=top,
            chunks=[
                Chunk(start=row.num_cached, num_tokens=count, prefix=row.prefix.num_tokens if row.prefix else 0)
                for row, count in zip(rows, counts, strict=True)
            ],
            device=self.model.device,
            num_past=self.cache.num_past,
            exact=self.exact,
        )
        new_ids = [token for row, count in zip(rows, counts, strict=True) for token in row.pending[:count]]
        for row, count in zip(rows, counts, strict=True):
            row.num_steps += not row.in_prompt
            row.num_cached += count
            del row.pending[:count]
        self.cache.reserve(num_rows=capacity, num_tokens=max(row.num_cached for row in rows))
        slots = self.cache.slots
        slots.rows, slots.columns, positions = chunks.slots()
        output = self.model(
            input_ids=torch.tensor([new_ids], device=self.model.device),
            position_ids=_positions(rows, chunks) if rows[0].prefix else positions[None],
            past_key_values=self.cache,
            use_cache=True,
            # An index, not a count: only the scores after each row's last token are wanted.
            logits_to_keep=chunks.last,
            chunks=chunks,
        )
        if chunks.num_calls != len(self.cache.slabs):
            name = type(self.model).__name__
            raise ModelError(
                f"{chunks.num_calls} of {len(self.cache.slabs)} layers of {name} use the attention interface of "
                "transformers, so batched generation cannot run it. Use model.generate."
            )
        return output.logits[0]  # type: ignore[no-any-return]

    def _choose(self, places: Sequence[int], logits: Tensor) -> list[Generation]:
        """Choose a token for the rows at `places` by `logits` ``[R, V]``; remove and return the rows that ended."""
        if not places:
            return []
        rows = [self.rows[place] for place in places]
        device = logits.device
        choices = choose_tokens(
            logits,
            allowed=[None if row.allowed is None else row.allowed.to(device, non_blocking=True) for row in rows],
            choosers=[row.chooser for row in rows],
        )
        ended = []
        for place, row, choice in reversed(list(zip(places, rows, choices, strict=True))):
            done = row.take(choice)
            if done is not None:
                ended.append(done)
                self._remove(place)
        return ended

    def _remove(self, place: int) -> None:
        self._keep_beginning(place)
        last = self.rows.pop()
        if place < len(self.rows):
            self.rows[place] = last
            if last.num_cached:
                self.cache.move_row(len(self.rows), place, last.num_cached)


def _positions(rows: Sequence[Row], chunks: Chunks) -> Tensor:
    """``[1, 2, T]``, both channels of the positions of the new tokens of rows that have contexts."""
    channels: tuple[list[int], list[int]] = ([], [])
    for row, chunk in zip(rows, chunks.chunks, strict=True):
        assert row.prefix is not None
        for channel, positions in zip(channels, row.prefix.positions(chunk.start, chunk.end), strict=True):
            channel += positions
    return torch.tensor([channels]).to(chunks.device, non_blocking=True)
