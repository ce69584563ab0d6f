"""Tensors of a foreign network, each of which has to find its place in ours."""

import torch


def match(tensors, net, their_name):
    """(the float32 `state_dict` of `net`, the tensors left over), of `tensors`, a dict, by their names.

    their_name: what they call the tensor that `net` calls by its argument. Raises ValueError where a tensor is missing, of another
    shape, or not finite.
    """
    remaining, state = dict(tensors), {}
    for name, expected in net.state_dict().items():
        theirs = their_name(name)
        if theirs not in remaining:
            raise ValueError(f"no tensor {theirs}")
        tensor = remaining.pop(theirs)
        if tensor.shape != expected.shape:
            raise ValueError(f"tensor {theirs} is of shape {list(tensor.shape)}, not {list(expected.shape)}")
        state[name] = tensor.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        if not state[name].isfinite().all():
            raise ValueError(f"tensor {theirs} is not finite")
    return state, remaining
