"""Use a quarter of an hour on a GPU well: sections by what they decide, rows written at once.

    python -m bench.gpu_session.cache --wheel triton-3.6.0-cp312-....whl     # before: compile what it will launch (no GPU)
    python -m bench.gpu_session --minutes 9                                  # there; a second call goes on where it stopped
    python -m bench.gpu_session --dry-run                                    # here: every section on a stand-in driver

The repository, torch, triton, numpy, pytest and xdist are enough. See docs/decisions/gpu-session.md.
"""
