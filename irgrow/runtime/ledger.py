"""The ledger: what was done to a model, as text that can be parsed (and replayed, see growth/replay.py)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

from irgrow.ir.errors import BadFile
from irgrow.ir.morphism import Morphism
from irgrow.ir.proposal import Proposal


@dataclass(frozen=True)
class Entry:
    """One growth: the text of its passes, and the structure hashes before and after."""

    by: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.before} -> {self.after}  {self.by}"


@dataclass(frozen=True)
class Ledger:
    """All growths of a model in order, and the proposals that their texts refer to by hash.

    `str(ledger)` is its text, one line per growth; `Ledger.parse(text)` reads it back.
    """

    entries: tuple[Entry, ...] = ()
    proposals: Mapping[str, Proposal] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __str__(self) -> str:
        return "\n".join(map(str, self.entries))

    def and_then(self, morphism: Morphism) -> Ledger:
        """The ledger with one more growth."""
        used = {p.hash: p for made in morphism.made_by for p in _proposals(made)}
        entry = Entry(morphism.by, morphism.before.structure, morphism.after.structure)
        return Ledger((*self.entries, entry), {**self.proposals, **used} if used else self.proposals)

    def first(self, count: int) -> Ledger:
        """The first `count` growths."""
        return Ledger(self.entries[:count], self.proposals)

    @staticmethod
    def parse(text: str, proposals: Mapping[str, Proposal] | None = None) -> Ledger:
        """The ledger that prints as `text`; raises BadFile for anything else."""
        entries = []
        for number, line in enumerate(filter(None, map(str.strip, text.splitlines())), 1):
            hashes, gap, by = line.partition("  ")
            before, arrow, after = hashes.partition(" -> ")
            if not (gap and arrow and before and after and by):
                raise BadFile(f"ledger, line {number}", repr(line), "hash -> hash  Pass(field=value, ...)")
            entries.append(Entry(by.strip(), before, after))
        return Ledger(tuple(entries), dict(proposals or {}))


def _proposals(made_by: object) -> Iterator[Proposal]:
    for f in fields(made_by):  # type: ignore[arg-type]
        value = getattr(made_by, f.name)
        if isinstance(value, Proposal):
            yield value
