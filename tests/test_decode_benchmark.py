"""The decoding benchmark times files that do what they say: a step with a cache is a step of the whole sequence."""

import numpy as np
import onnx
import pytest
import torch

WIDTH, DEPTH = 16, 1


@pytest.fixture(scope="module")
def decode():
    import decode

    return decode


def test_every_file_computes_its_step(decode, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "NORMS", {"static": decode.NORMS["static"]})
    monkeypatch.setattr(decode, "SHAPED", ("cpu",))
    files = decode.write_files(tmp_path, WIDTH, DEPTH)
    inputs = decode.example(WIDTH, DEPTH, 1, 9)
    for name, path in files.items():
        loaded = decode.open_file(path, 1)
        names = [entry.name for entry in loaded.get_inputs()]
        got = loaded.run(None, dict(zip(names, (t.numpy() for t in inputs), strict=True)))
        with torch.no_grad():
            expected = decode.trained(WIDTH, DEPTH, "static")(*inputs)
        for value, want in zip(got, expected, strict=True):
            np.testing.assert_allclose(value, want.numpy(), atol=1e-4 * want.abs().max().item(), err_msg=name)
    assert list(files) == ["folded", "shaped, cpu"]
    moved = [sum(node.op_type == "Transpose" for node in onnx.load(path).graph.node) for path in files.values()]
    assert moved == [2, 0]


def test_a_step_with_its_cache_is_the_end_of_a_sequence(decode):
    model = decode.trained(WIDTH, DEPTH, "static")
    tokens = torch.randint(decode.VOCABULARY, (1, 5))
    keys = values = torch.zeros(DEPTH, 1, 2, 0, WIDTH // 2)
    with torch.no_grad():
        for position in range(5):
            logits, key, value = model(tokens[:, position : position + 1], keys, values)
            keys, values = torch.cat((keys, key), 3), torch.cat((values, value), 3)
        x = model.embedding(tokens)
        block = model.blocks[0]
        qkv = block.qkv(block.norm1(x)).reshape(1, 5, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(*qkv.unbind(0), is_causal=True)
        x = x + block.out(mixed.transpose(1, 2).reshape(1, 5, WIDTH))
        x = x + block.down(torch.nn.functional.gelu(block.up(block.norm2(x))))
        whole = model.head(model.last(x))
    torch.testing.assert_close(logits[:, 0], whole[:, -1], rtol=1e-4, atol=1e-4)
