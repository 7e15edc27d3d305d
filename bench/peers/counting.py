"""What a peer written in Python ran in the measured window; imported by the scripts beside it."""

import asyncio
import time


class Count:
    """What ran, and whether two commands of a project ever ran at once."""

    def __init__(self) -> None:
        self.done = 0
        self.overlaps = 0
        self._running: set[str] = set()

    async def run(self, project: str) -> None:
        """One command that does nothing."""
        self.overlaps += project in self._running
        self._running.add(project)
        await asyncio.sleep(0)
        self._running.discard(project)
        self.done += 1

    async def window(self, work: dict[str, float]) -> dict[str, object]:
        """Wait for the first command and the warm-up, then count."""
        deadline = time.perf_counter() + work["patience_s"]
        while not self.done and time.perf_counter() < deadline:
            await asyncio.sleep(0.01)
        await asyncio.sleep(work["warm_s"])
        before, began = self.done, time.perf_counter()
        await asyncio.sleep(work["window_s"])
        took_s = time.perf_counter() - began
        return {"per_s": (self.done - before) / took_s, "overlaps": self.overlaps}
