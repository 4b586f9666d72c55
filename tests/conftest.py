"""Fixtures that many tests share: the small model in the repository and text to measure it with."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]

# How long an example takes says nothing while other tests run beside it. Each machine draws its own
# examples, so few a run are many a week; `--hypothesis-profile thorough` draws many at once.
settings.register_profile("short", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=400)
settings.load_profile("short")

# Tests that run side by side share the cores. Each on all of them, small matrices wait several
# times as long for threads of one another as they take. Set before anything imports torch.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // WORKERS)))


@pytest.fixture(scope="session")
def novels_8m() -> Path:
    """A Llama of 8 million parameters, trained on novels."""
    return REPOSITORY / "tests" / "assets" / "novels-8m"


@pytest.fixture(scope="session")
def trained_mixture() -> Path:
    """A Qwen3-MoE of less than a million parameters that novels-8m has taught."""
    return REPOSITORY / "tests" / "assets" / "mixture"


@pytest.fixture(scope="session")
def validation_text() -> Path:
    """Text of the same kind that novels-8m was not trained on."""
    shared = Path(os.environ.get("COMPRESS_SHARED", REPOSITORY.parent / "shared"))
    path = shared / "data" / "novels-validation.txt"
    if not path.is_file():
        pytest.skip("needs data/novels-validation.txt in the folder that COMPRESS_SHARED names")
    return path


@pytest.fixture(scope="session")
def some_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand tokens of English that every clone has: the licence."""
    path = tmp_path_factory.mktemp("text") / "license.txt"
    path.write_bytes((REPOSITORY / "LICENSE").read_bytes())
    return path
