"""A whole step on two processes: tracked, masked and in DDP, against DDP and torch's fused SGD."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import full
from benchmarks.networks import NETWORKS
from benchmarks.ranks import Job


@pytest.mark.parametrize("network", [full("resnet18"), "encoder"])
def test_ddp(bench, threads, network):
    if threads != 1:
        pytest.skip("two processes of one thread each")
    with Job(network) as job:
        torch.testing.assert_close(job.step("ours"), job.step("peer"), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(job.step("ours"), job.step("peer"), rtol=1e-4, atol=1e-4)
        inputs = NETWORKS[network]()[1]
        bench(
            f"{network}, 2 processes",
            lambda: job.step("ours"),
            {"step_ddp": lambda: job.step("peer")},
            inputs[0],
        )
