"""Count and name the images that did not decode, each once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from accelerate.utils import gather_object

from training.data.seeded import BadImage
from training.errors import UserError


class BadImages:
    """What to do about images that do not decode, and a record of them.

    Args:
        policy: "fail" raises :class:`UserError` at the first; "skip" notes it.
        say: prints a line for people.
    """

    def __init__(
        self, policy: Literal["skip", "fail"], say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.policy, self.say = policy, say
        self.seen: dict[str, str] = {}

    def note(self, bad: Iterable[BadImage]) -> None:
        """Take note of a batch's bad images, or raise."""
        for item in bad:
            if self.policy == "fail":
                raise UserError(
                    f"image {item.name!r} does not decode: {item.reason}; "
                    "data.on_bad_image: skip would leave it out"
                )
            if item.name not in self.seen:
                self.seen[item.name] = item.reason
                self.say(f"skipped, does not decode ({len(self.seen)}): {item.name}: {item.reason}")

    def restore(self, seen: dict[str, str]) -> None:
        """Go on from what :meth:`gather` returned, in a run that is resumed."""
        self.seen.update(seen)

    def gather(self) -> dict[str, str]:
        """Return name and reason of every bad image that any process met."""
        merged: dict[str, str] = {}
        for part in gather_object([self.seen]):
            merged.update(part)
        return dict(sorted(merged.items()))
