"""Where the time of a run goes, over all its restarts: `goodput.json`."""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax

from sparx_jax.training.logging import Stopwatch, duration
from sparx_jax.training.workdir import replace_text

ACTIVITIES = (
    "initialisation",  # imports are not seen: they end before
    "compilation",  # with the first step and the first batch of evaluation
    "data",  # steps that wait for their batch
    "steps",
    "evaluation",
    "checkpoints",  # steps that wait for a write to start or, at the end, to finish
    "report",
)


class Goodput(Stopwatch):
    """Counts the seconds of a session by activity, in the run's list of sessions.

    Of a killed session the file knows what was written last, so `lost_steps`, done
    but not saved, are counted up to then.
    """

    def __init__(self, workdir: str):
        super().__init__()
        self.seconds |= dict.fromkeys(ACTIVITIES, 0.0)
        self._path = Path(workdir) / "goodput.json"
        self._session: dict[str, Any] = {"started": time.strftime("%FT%T%z")}

    def start(self, step: int) -> str:
        """Notes the step that the session starts from; tells what a restart lost.

        No other session may be under way.
        """
        self._sessions = read_sessions(self._path.parent)
        lost = max(0, self._sessions[-1]["to_step"] - step) if self._sessions else 0
        self._session |= {
            "from_step": step,
            "to_step": step,
            "lost_steps": lost,
            "seconds": self.seconds,
        }
        self._sessions.append(self._session)
        return f"{lost:,} steps were lost with the last session" if lost else ""

    def write(self, step: int) -> None:
        """Replaces the file, on process 0 only; `step` is the last one done."""
        self._session["to_step"] = step
        if jax.process_index() != 0:
            return
        content = summary(self._sessions) | {"sessions": self._sessions}
        replace_text(self._path, json.dumps(content, indent=1) + "\n")

    def sentence(self) -> str:
        """The seconds of this session, and the goodput of the run."""
        parts = [f"{k} {duration(v)}" for k, v in self.seconds.items() if v >= 0.5]
        share = summary(self._sessions)["goodput"]
        return f"{', '.join(parts)}; goodput {share:.0%}"


def summary(sessions: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a run: `goodput`, the share of its time in steps that were not lost again,
    `seconds` by activity, `lost_steps` and `restarts`."""
    seconds = {a: sum(s["seconds"][a] for s in sessions) for a in ACTIVITIES}
    useful = 0.0
    for session, after in itertools.pairwise([*sessions, {}]):
        done = session["to_step"] - session["from_step"]
        kept = max(0, done - after.get("lost_steps", 0)) / done if done else 0
        useful += kept * session["seconds"]["steps"]
    total = sum(seconds.values())
    return {
        "goodput": useful / total if total else 0.0,
        "seconds": seconds,
        "lost_steps": sum(s["lost_steps"] for s in sessions),
        "restarts": len(sessions) - 1,
    }


def read_sessions(workdir: str | Path) -> list[dict[str, Any]]:
    """The sessions of a run so far; none if the file cannot be read."""
    try:
        sessions = json.loads((Path(workdir) / "goodput.json").read_text())["sessions"]
        summary(sessions)  # they have all that it needs
        return sessions
    except (OSError, ValueError, LookupError, TypeError):  # no reason to lose a run
        return []
