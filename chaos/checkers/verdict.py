"""What a checker answers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """`problems` is empty when the claim held; `checked` says with numbers what was looked at."""

    claim: str
    problems: tuple[str, ...]
    checked: str

    @property
    def held(self) -> bool:
        return not self.problems
