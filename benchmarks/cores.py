"""How far apart the two cores are: nanoseconds that a word takes from one to the other.

A virtual machine's two cores are at times near and at times far, as the host moves them about. Far apart, Adam takes 0.64 ms
for a matrix of 784 x 400 that both cores have read in a product since, near 0.12 ms, and 0.07 ms either way if nobody has: what
is written has to leave the other cache first. That changes ratios between contestants, not only their seconds.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

APART = 90.0
"""Nanoseconds from which cores are called far: 30 to 80 were seen, as within one L3 cache of an EPYC, and 160 to 260, as
between two. Which it is, a virtual machine does not say."""

SOURCE = r"""
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

static _Alignas(128) atomic_int word;
static int turns, there;

static void hold(int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
}

static void play(int first) {
    for (int i = first; i < 2 * turns; i += 2) {
        while (atomic_load_explicit(&word, memory_order_acquire) != i) {}
        atomic_store_explicit(&word, i + 1, memory_order_release);
    }
}

static void *answer(void *nothing) {
    hold(there);
    play(1);
    return nothing;
}

double nanoseconds(int here, int other, int count) {
    struct timespec start, end;
    pthread_t thread;
    cpu_set_t before;
    pthread_getaffinity_np(pthread_self(), sizeof before, &before);
    turns = count, there = other;
    atomic_store(&word, 0);
    if (pthread_create(&thread, 0, answer, 0)) return NAN;
    hold(here);
    clock_gettime(CLOCK_MONOTONIC, &start);
    play(0);
    pthread_join(thread, 0);
    clock_gettime(CLOCK_MONOTONIC, &end);
    pthread_setaffinity_np(pthread_self(), sizeof before, &before);
    return ((end.tv_sec - start.tv_sec) * 1e9 + (end.tv_nsec - start.tv_nsec)) / (2.0 * count);
}
"""


def latency(turns: int = 50_000) -> float:
    """Return the nanoseconds from core to core; NaN with one core, without a C compiler, or not on Linux."""
    function = _function()
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if function is None or len(mine) < 2:
        return math.nan
    return float(function(mine[0], mine[1], turns))


@functools.cache
def _function() -> ctypes._NamedFuncPointer | None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or os.name != "posix":
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "cores.c"), Path(folder, "cores.so")
        source.write_text(SOURCE, encoding="utf-8")
        command = [compiler, "-O2", "-shared", "-fPIC", "-pthread", "-o", str(library), str(source)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        function = ctypes.CDLL(str(library)).nanoseconds
    function.restype = ctypes.c_double
    return function
