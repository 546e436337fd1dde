import pytest
import torch
import torch.nn.functional as F

from adversarial_flow.models.second_order import gelu_second_derivative, twice_differentiable_gelu


def test_twice_differentiable_gelu():
    """The values, and first derivatives in both modes, are torch's own; the second derivative is right and fast."""
    torch.manual_seed(0)
    x, tangent = torch.randn(2, 4, 50, dtype=torch.float64)
    x = (4 * x).requires_grad_()

    def reference(x):
        return F.gelu(x, approximate="tanh")

    for function in (twice_differentiable_gelu, reference):
        value = function(x)
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.sum(), x)
        _, forward = torch.func.jvp(function, (x,), (tangent,))
        _, both = torch.func.vmap(lambda v, f=function: torch.func.jvp(f, (x,), (v,)))(torch.stack([tangent, x]))
        (mixed,) = torch.autograd.grad(both.square().sum(), x)
        if function is twice_differentiable_gelu:
            own = value, gradient, forward, both, second, mixed
    other = value, gradient, forward, both, second, mixed
    assert all(torch.equal(a, b) for a, b in zip(own[:4], other[:4]))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(own[4:], other[4:]))
    assert torch.allclose(gelu_second_derivative(x.detach()), second, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradgradcheck(twice_differentiable_gelu, x)


def test_transforms_of_the_second_derivative():
    """It can be batched; a third derivative, which is not offered, is an error and not wrong."""
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)

    def slope(function):
        return torch.func.grad(lambda v: function(v).sum())

    def reference(v):
        return F.gelu(v, approximate="tanh")

    own, expected = (torch.func.jacrev(slope(function))(x) for function in (twice_differentiable_gelu, reference))
    assert torch.allclose(own, expected)
    x.requires_grad_()
    (first,) = torch.autograd.grad(twice_differentiable_gelu(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(second.sum(), x)
