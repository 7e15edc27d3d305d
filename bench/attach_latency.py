"""What the attach protocol costs: launch, a byte's way, the end, bulk, an idle observer.

Bounded: about ten seconds and 200 MB of disk per call. Figures are for one PATH, that is for one
shell and userland; `exec_ms` (fork and exec of `true` by that shell) tells how busy the machine is.
"""

import os
import statistics
import subprocess
import sys
import time
import uuid
from pathlib import Path

import trio

from rdev.adapters.execution.local import LocalExecutor
from rdev.domain.execution import Exit, Offsets, Piece, Spec
from rdev.domain.ids import AttemptId, ProjectId, attempt_id, command_id

PROJECT = ProjectId("bench")
CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

# Each line is the time it was written; the last one also that of the end.
_LINES = """
import os, sys, time
for _ in range(int(sys.argv[1])):
    time.sleep(float(sys.argv[2]))
    os.write(1, b"%d\\n" % time.monotonic_ns())
os._exit(0)
"""


def measure(
    projects_dir: Path,
    *,
    path: str = "/usr/local/bin:/usr/bin:/bin",
    launches: int = 20,
    lines: int = 60,
    idle_s: float = 10.0,
    bulk_bytes: int = 200_000_000,
) -> dict[str, float]:
    """Measure with the `sh` and the tools found on `path`, in a loop of its own."""
    return trio.run(_measure, projects_dir.resolve(), path, launches, lines, idle_s, bulk_bytes)


async def _measure(
    projects_dir: Path, path: str, launches: int, lines: int, idle_s: float, bulk_bytes: int
) -> dict[str, float]:
    executor = LocalExecutor(projects_dir=projects_dir, base_env={"PATH": path}, machine_id="bench")
    await executor.prepare(PROJECT)
    result = {"exec_ms": _exec_ms(path)}
    result |= await _launch(executor, launches)
    result |= await _lines(executor, projects_dir, lines)
    result |= await _bulk(executor, bulk_bytes)
    result |= await _idle(executor, projects_dir, idle_s)
    return result


def _new_attempt() -> AttemptId:
    return attempt_id(command_id(uuid.uuid4()), 1)


def _exec_ms(path: str) -> float:
    loop = "I=0; while [ $I -lt 100 ]; do env true; I=$((I + 1)); done"
    began = time.perf_counter()
    subprocess.run(["sh", "-c", loop], env={"PATH": path}, check=True)
    return (time.perf_counter() - began) * 10


def _percentiles(name: str, samples_ms: list[float]) -> dict[str, float]:
    ordered = sorted(samples_ms)
    return {
        f"{name}_p50_ms": statistics.median(ordered),
        f"{name}_p99_ms": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
    }


async def _launch(executor: LocalExecutor, count: int) -> dict[str, float]:
    """`true`, from the call of attach to its Exit."""
    instance, samples = await executor.instance(PROJECT), []
    for _ in range(count):
        began = time.perf_counter()
        async with executor.attach(
            PROJECT,
            _new_attempt(),
            spec=Spec(argv=("true",), timeout_s=60),
            instance=instance,
            offsets=Offsets(),
        ) as attachment:
            assert isinstance(await attachment.receive(), Exit)
            samples.append((time.perf_counter() - began) * 1000)
    return _percentiles("launch_to_exit", samples)


async def _lines(executor: LocalExecutor, projects_dir: Path, count: int) -> dict[str, float]:
    """From the write of a line to its receive, at 20 lines a second; and from the last to Exit.

    `line_cpu_ms`: CPU of the project's side per line, idle cost included.
    """
    instance, ways, ends, cpu = await executor.instance(PROJECT), [], [], [0.0]
    for turn in range(4):
        argv = (sys.executable, "-c", _LINES, str(count if turn == 0 else 1), "0.05")
        async with executor.attach(
            PROJECT,
            _new_attempt(),
            spec=Spec(argv=argv, timeout_s=60),
            instance=instance,
            offsets=Offsets(),
        ) as attachment:
            last_ns = 0
            while isinstance(piece := await attachment.receive(), Piece):
                last_ns = int(piece.data.split()[-1])
                ways.append((time.monotonic_ns() - last_ns) / 1e6)
                if turn == 0 and len(ways) in (10, count - 10):
                    cpu.append(_cpu_ms(projects_dir))
            ends.append((time.monotonic_ns() - last_ns) / 1e6)
    per_line = (cpu[-1] - cpu[1]) / (count - 20)
    return _percentiles("line", ways) | _percentiles("end", ends) | {"line_cpu_ms": per_line}


async def _bulk(executor: LocalExecutor, size: int) -> dict[str, float]:
    instance, got = await executor.instance(PROJECT), 0
    began = time.perf_counter()
    async with executor.attach(
        PROJECT,
        _new_attempt(),
        spec=Spec(argv=("head", "-c", str(size), "/dev/zero"), timeout_s=60),
        instance=instance,
        offsets=Offsets(),
    ) as attachment:
        while isinstance(piece := await attachment.receive(), Piece):
            got += len(piece.data)
    assert got == size
    return {"bulk_mb_per_s": size / 1e6 / (time.perf_counter() - began)}


async def _idle(executor: LocalExecutor, projects_dir: Path, idle_s: float) -> dict[str, float]:
    """CPU of all processes around a silent attempt (observers, supervisor, watchdog)."""
    instance, attempt = await executor.instance(PROJECT), _new_attempt()
    async with executor.attach(
        PROJECT,
        attempt,
        spec=Spec(argv=("sh", "-c", "echo ready; exec sleep 1000"), timeout_s=60),
        instance=instance,
        offsets=Offsets(),
    ) as attachment:
        await attachment.receive()
        await trio.sleep(2)
        before = _cpu_ms(projects_dir)
        await trio.sleep(idle_s)
        spent = _cpu_ms(projects_dir) - before
        await executor.kill(PROJECT, attempt, grace_s=3)
    return {"idle_cpu_percent": spent / idle_s / 10}


def _cpu_ms(folder: Path) -> float:
    """CPU time of the processes that work below a folder, their reaped children included."""
    ticks = 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "cwd").startswith(str(folder)):
                fields = (entry / "stat").read_text().rpartition(") ")[2].split()
                ticks += sum(int(field) for field in fields[11:15])
        except OSError:
            continue  # it ended meanwhile
    return ticks * 1000 / CLOCK_TICKS_PER_S
