"""Decides who of a job has fallen silent, fairly: who stood still itself judges nobody by that."""

from collections.abc import Mapping


def forgiven(since: float, gap: float, now: float, timeout: float, moment: float) -> float:
    """Returns since when another one counts as silent, for a process that stood still itself.

    What this process missed does not count, and the other has a moment to be heard. That moment is
    enough after the time-out: by then the other has given this process up, and has ended.

    Args:
      gap: seconds that this process stood still, until `now`.
      timeout: seconds of silence after which a process counts as gone.
      moment: seconds within which one that lives is heard.
    """
    least = now - timeout + moment
    return min(now, least if gap > timeout else max(least, since + gap))


class Silence:
    """The last sign of life of each process, and when it came."""

    def __init__(self, timeout: float, moment: float):
        self._timeout, self._moment = timeout, moment
        self._seen: dict[str, tuple[str, float]] = {}
        self._doubted: set[str] = set()

    def stood_still(self, gap: float, now: float) -> None:
        """Notes that this process itself did nothing for so long."""
        self._seen = {
            who: (sign, forgiven(since, gap, now, self._timeout, self._moment))
            for who, (sign, since) in self._seen.items()
        }
        if gap > self._timeout:
            self._doubted = set(self._seen)

    def hear(self, signs: Mapping[str, str], now: float) -> list[str]:
        """Takes the newest sign of each process; returns those that count as gone."""
        for who, sign in signs.items():
            if who not in self._seen or self._seen[who][0] != sign:
                since = now
                if who in self._doubted:
                    # Its last words, which waited in the socket while this process stood still?
                    self._doubted.remove(who)
                    since = min(now, now - self._timeout + self._moment)
                self._seen[who] = sign, since
        return [who for who in signs if now - self._seen[who][1] > self._timeout]
