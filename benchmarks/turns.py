"""What the benchmarks share: run ours and its peers in turns, check that they computed the same, print the ratios."""
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from joblib import cpu_count

from faces.files import InputError


def in_turns(programs: dict[str, Callable], turns: int, device="cpu", warm_up: int = 0) -> dict[str, list]:
    """Run every program once per turn, so that a slowdown of the machine affects all; return the seconds of each turn.

    Programs are functions of the turn's number, from 0, by name; ours comes first. The clock stops when the device has
    finished. Before the turns that count are `warm_up` others, in which kernels are prepared and files come into
    memory.
    """
    device, seconds = torch.device(device), {name: [] for name in programs}
    for turn in range(warm_up + turns):
        for name, program in programs.items():
            wait_for(device)
            start = time.perf_counter()
            program(turn)
            wait_for(device)
            seconds[name].append(time.perf_counter() - start)
            part = f"turn {turn - warm_up + 1} of {turns}" if turn >= warm_up else "warm-up"
            print(f"{part}: {name} {seconds[name][-1]:.3f} s", file=sys.stderr)
    return {name: values[warm_up:] for name, values in seconds.items()}


def wait_for(device):
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def report(seconds: dict[str, list], count: float, unit: str, device="cpu"):
    """Print the machine, and for each program of in_turns() its median rate and how many times as fast ours, the first,
    is. `count` is how many units, such as "faces", a turn processes."""
    print(f"{machine(device)}; medians of {len(next(iter(seconds.values())))} turns")
    cost = {name: np.array(values) / count for name, values in seconds.items()}    # seconds per unit
    ours = next(iter(cost))
    print(f"{'':54}{unit + '/s':>12}  ratio (per turn)")
    for name, values in cost.items():
        ratios = values / cost[ours]
        ratio = "" if name == ours else (f"{np.median(values) / np.median(cost[ours]):7.2f} ({ratios.min():.2f} to "
                                         f"{ratios.max():.2f})")
        print(f"{name:54}{1 / np.median(values):12,.1f}{ratio}")


def check_same(what: str, ours, peer, tolerance: float):
    """Print how much two tensors or arrays differ (L2, relative); raise InputError if it is more than `tolerance`."""
    ours, peer = (torch.as_tensor(value).detach().double().cpu() for value in (ours, peer))
    difference = ((ours - peer).norm() / peer.norm()).item()
    print(f"{what}: the same within {difference:.1e}", file=sys.stderr)
    if not difference <= tolerance:
        raise InputError(f"{what} of ours and the peer differ by {difference:.1e}, more than rounding explains "
                         f"({tolerance:.0e}); please report this as a bug.")


def machine(device="cpu") -> str:
    """Return the name of a device, the number of CPU cores and threads, and the version of PyTorch."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return f"{name}, {cpu_count()} CPU cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
