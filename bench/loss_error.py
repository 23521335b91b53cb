"""The error of the head and its loss against fp64, ours beside PyTorch's: python bench/loss_error.py

Runs on a CPU at a small size (our kernels in Triton's interpreter) and on a GPU if there is one. Errors are the largest
over a tensor, divided by the largest of the truth, which is made in fp64 of the same rounded inputs. In the interpreter
ours in bf16 is at a disadvantage of up to one unit in the last place: it truncates where a GPU rounds.
"""

import argparse
import os

import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from halny.kernels import dispatch
from halny.kernels import linear_cross_entropy as lce

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def ours(hidden, weight, labels):
    return lce.linear_cross_entropy(hidden, weight, labels).loss


def plain(hidden, weight, labels):
    logits = hidden @ weight.T
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)


def native(hidden, weight, labels):
    """PyTorch's chunked form, in as many chunks as ours."""
    rows = lce.chunk_rows(len(hidden), *weight.shape, weight.element_size())
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
    return F.linear_cross_entropy(hidden, weight, labels, options=options)


def loss_and_gradients(function, hidden, weight, labels):
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    loss = function(*leaves, labels)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--chunk-rows", type=int, default=16, help="of ours and of PyTorch's chunked form")
    sizes = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lce.chunk_rows = lambda *_: sizes.chunk_rows
    print(f"torch {torch.__version__}, {device}: {sizes.rows} rows x {sizes.dim} x {sizes.vocabulary}, mean; ", end="")
    print("largest error / largest value of the fp64 truth")
    print(f"{'dtype':6}{'targets':11}{'form':34}{'loss':>10}{'d_hidden':>10}{'d_weight':>10}")
    for name, dtype in DTYPES.items():
        for kind, confidence in (("random", 0.0), ("confident", 12.0)):
            torch.manual_seed(0)
            weight = torch.randn(sizes.vocabulary, sizes.dim)
            labels = torch.randint(sizes.vocabulary, (sizes.rows,))
            hidden = torch.randn(sizes.rows, sizes.dim) / sizes.dim**0.5
            hidden += confidence * weight[labels] / weight[labels].square().sum(-1, keepdim=True)
            labels[::5] = -100
            inputs = hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)
            truth = loss_and_gradients(plain, inputs[0].double(), inputs[1].double(), inputs[2])
            for form, function in (
                ("ours", ours),
                ("torch, same dtype, loss in fp32", plain),
                ("torch F.linear_cross_entropy", native),
            ):
                line = f"{name:6}{kind:11}{form:34}"
                if function is native and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
                    print(f"{line}{'absent from this torch':>30}")
                    continue
                dispatch.launches.clear()
                got = loss_and_gradients(function, *inputs)
                if bool(dispatch.launches) != (function is ours):
                    raise RuntimeError(f"{form}: kernels ran where they should not, or did not where they should")
                for x, true in zip(got, truth, strict=True):
                    line += f"{((x.double() - true).abs().max() / true.abs().max()).item():10.1e}"
                print(line)


if __name__ == "__main__":
    main()
