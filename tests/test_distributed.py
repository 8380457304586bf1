"""How the ranks of a run wait for each other."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRINT_TIMEOUT_H = """
import torch, torch.distributed as dist
from trainer.distributed import init_distributed
init_distributed()
print(dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 3600)
"""


def test_a_long_rollout_of_the_first_rank_is_waited_for():
    done = subprocess.run([sys.executable, "-c", PRINT_TIMEOUT_H], cwd=ROOT, capture_output=True, text=True)
    assert float(done.stdout) >= 6, done
