"""FullyShardedDataParallel (FSDP1) with ``use_orig_params=True``: 1-D slices of one flat parameter per unit.

Nothing on such a slice tells its layer's shape, its place or its ranks: only the unit's ``FlatParamHandle`` does, and
no attribute leads from the parameter to it. The live handles are therefore looked up once, when the layout is built.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from scale_digrap.sharding.placement import Placement, RowRun, flat_runs


def placements(params: Sequence[Tensor]) -> dict[int, Placement]:
    """``{id(param): Placement}`` of those parameters that FSDP1 has flattened; empty without FSDP1.

    Raises:
        ValueError: a whole flat parameter was passed (``use_orig_params=False``), or its unit no longer exists.
    """
    for param in params:
        if getattr(param, "_is_flat_param", False):
            raise ValueError(
                f"a FlatParameter of {param.numel()} elements hides the layers inside it; "
                "wrap the model with FullyShardedDataParallel(..., use_orig_params=True)"
            )
    wanted = {id(param) for param in params if getattr(param, "_fsdp_flattened", False)}
    if not wanted:
        return {}
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    found: dict[int, Placement] = {}
    for handle in [obj for obj in gc.get_objects() if isinstance(obj, FlatParamHandle)]:
        flat, ranks = handle.flat_param, tuple(dist.get_process_group_ranks(handle.process_group))
        for param, shape, info in zip(flat._params or (), flat._shapes, flat._shard_param_infos, strict=True):
            if id(param) not in wanted:
                continue
            if not handle.uses_sharded_strategy:
                rows = shape[0] if shape else 1
                whole = (RowRun(0, rows, math.prod(shape) // rows),)
                found[id(param)] = Placement(shape, 1, whole, ranks=ranks)
                continue
            shards = handle.process_group.size()
            if not info.in_shard:
                found[id(param)] = Placement(shape, shards, (), offset=0, ranks=ranks)
                continue
            assert info.intra_param_start_idx is not None
            assert info.intra_param_end_idx is not None
            start, stop = info.intra_param_start_idx, info.intra_param_end_idx + 1
            runs = flat_runs(shape, start, stop)
            found[id(param)] = Placement(shape, shards, runs, offset=start, ranks=ranks)
    if missing := wanted - set(found):
        raise ValueError(
            f"{len(missing)} parameters were flattened by FSDP1 but their FSDP unit is gone; "
            "build the optimizer from the live wrapped model's named_parameters()"
        )
    return found
