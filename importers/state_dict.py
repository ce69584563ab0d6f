"""Matches the tensors of another project's network to ours."""

import torch


def match(tensors, net, their_name):
    """(the float32 `state_dict` of `net`, the tensors left over) from the dict `tensors` by name.

    their_name: a function from the name of a tensor in `net` to its name in `tensors`. Raises ValueError if a tensor is missing,
    has another shape, or is not finite.
    """
    remaining, state = dict(tensors), {}
    for name, expected in net.state_dict().items():
        theirs = their_name(name)
        if theirs not in remaining:
            raise ValueError(f"no tensor {theirs}")
        tensor = remaining.pop(theirs)
        if tensor.shape != expected.shape:
            raise ValueError(f"tensor {theirs} has shape {list(tensor.shape)}, not {list(expected.shape)}")
        state[name] = tensor.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        if not state[name].isfinite().all():
            raise ValueError(f"tensor {theirs} is not finite")
    return state, remaining
