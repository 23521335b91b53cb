"""The bytes that a launch of each kernel of ours moves, if every tensor crosses the memory bus once."""

from torch import Tensor


def size(*tensors: Tensor) -> int:
    """Bytes of what tensors have: an expanded dimension is there once."""
    total = 0
    for x in tensors:
        n = x.element_size()
        for length, stride in zip(x.shape, x.stride(), strict=True):
            n *= length if stride else min(length, 1)
        total += n
    return total


# What each kernel of ours reads and writes, from its arguments as launched (a) and its constants (c). One that is not
# here stops a count: state its traffic.
TRAFFIC = {
    "rms_norm_forward_kernel": lambda a, c: (
        [a[0], a[2], *[a[1]] * c["ADD"], *[a[5]] * c["RECOMPUTE"]],
        [a[3], *[a[4]] * c["ADD"], *[a[5]] * (not c["RECOMPUTE"])],
    ),
    "rms_norm_backward_kernel": lambda a, c: (
        [a[0], a[2], a[3], a[4], *[a[1]] * c["HAS_DS"]],
        [*[a[5]] * c["NEEDS_DX"], *[a[6]] * c["NEEDS_DW"], *[a[7]] * c["RECOMPUTE_Y"]],
    ),
    "rms_norm_dweight_kernel": lambda a, c: ([a[0]], [a[1]]),
    "rope_kernel": lambda a, c: (  # of the tables the rows of positions 0 .. T - 1
        [a[0], a[1], a[4][: a[7]], a[5][: a[7]], *[a[2]] * c["WITH_V"], *[a[6]] * c["HAS_POSITIONS"]],
        [a[3] if c["WITH_V"] else a[3][:, :, : c["N_HEADS"] + c["N_KV_HEADS"]]],
    ),
    "embedding_backward_kernel": lambda a, c: (a[:3], [a[3][: a[4]]]),  # at most as many rows as there are tokens
    "swiglu_forward_kernel": lambda a, c: ([a[0]], [a[1]]),
    "swiglu_backward_kernel": lambda a, c: ([a[0], a[1]], [a[2], *[a[3]] * c["RECOMPUTE_H"]]),
    # its second pass reads what is in L1 or L2
    "cross_entropy_kernel": lambda a, c: (a[:3], [a[3], a[4], *[a[5]] * c["WITH_GRADIENT"]]),
    "scale_kernel": lambda a, c: (a[:2], [a[2]]),
    "adamw_kernel": lambda a, c: (
        [*a[:5], *a[5:7] * c["EIGHT_BITS"], a[7]],
        [a[0], a[1], a[3], a[4], *a[5:7] * c["EIGHT_BITS"]],
    ),
    "block_norms_kernel": lambda a, c: ([a[0]], [a[1][a[3] : a[3] + -(-a[2] // c["BLOCK"])]]),
    "add_rounded_kernel": lambda a, c: (a[:2], [a[0]]),
    "add_wide_kernel": lambda a, c: (a[:2], [a[2]]),
    "chunk_cat_kernel": lambda a, c: ([a[0]], [a[1]]),
}
