"""What became of the rows that were read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReadReport:
    """Counts of one reading; `str(report)` is one line for people.

    Attributes:
        source: what was read, and as what schema.
        read: rows.
        kept: prompts in the pool.
        empty: rows without a prompt, or without the reference answer that they should have.
        duplicates: rows whose rendered prompt and answer an earlier row has.
        overlong: prompts of more than `max_prompt_length` tokens.
        max_prompt_length: None for no limit.
        held_out: prompts taken out for validation.
        hidden_columns: columns that the rewards do not get, because an argument of theirs has that name.
    """

    source: str
    read: int
    kept: int
    empty: int = 0
    duplicates: int = 0
    overlong: int = 0
    max_prompt_length: int | None = None
    held_out: int = 0
    hidden_columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        dropped = {
            "empty": self.empty,
            "duplicate": self.duplicates,
            f"longer than {self.max_prompt_length} tokens": self.overlong,
        }
        parts = [f"{count} {why}" for why, count in dropped.items() if count]
        line = f"{self.source}: {self.read} rows read, {self.kept} prompts kept"
        line += f", {self.held_out} held out for validation" if self.held_out else ""
        line += f", dropped {', '.join(parts)}" if parts else ""
        if self.hidden_columns:
            line += f"; not handed to rewards: {', '.join(self.hidden_columns)}"
        return line
