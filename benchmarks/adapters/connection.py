"""How a process of ours becomes one of DeepSpeed's."""

from __future__ import annotations

import logging
import os

import torch.distributed as dist


def connect_deepspeed(on_cpu: bool) -> None:
    """It looks ranks up in the environment, and uses the group that is there."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update({"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world})
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.disable(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    # It would compile a shared-memory all-reduce for inference, for minutes and with a lock.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist.get_backend(), dist_init_required=False)
