import torch

from farspan.parallel.megatron import compiled_when_called


def test_functions_are_compiled_when_they_are_called_and_once():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compile_now = torch.compile
    with compiled_when_called():

        @torch.compile(backend=backend)
        def double(x: torch.Tensor) -> torch.Tensor:
            """Twice."""
            return x * 2

        triple = torch.compile(lambda x: x * 3, backend=backend)
    assert torch.compile is compile_now
    assert double.__name__ == "double"
    assert not graphs
    assert double(torch.ones(2)).tolist() == [2.0, 2.0]
    assert double(torch.ones(2)).tolist() == [2.0, 2.0]
    assert len(graphs) == 1
    assert triple(torch.ones(2)).tolist() == [3.0, 3.0]
    assert len(graphs) == 2


def test_what_megatron_core_decorates_computes_the_same():
    from megatron.core.fusions.fused_bias_gelu import bias_gelu  # a function it decorates

    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(3, 4, generator=generator), torch.randn(4, generator=generator)
    expected = torch.nn.functional.gelu(x + bias, approximate="tanh")
    torch.testing.assert_close(bias_gelu(bias, x), expected, rtol=1e-5, atol=1e-6)
