"""The operations of random programs, each on values of shape [batch, length, width]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

COUNTS = (1, 2, 0, 1)  # of positions


class Steps(nn.Module):
    """``do_<kind>(operands, n)`` for every kind of step; n chooses the layer, or the spelling."""

    LENGTH = 4
    # What is compared must not be the rounding of a zero, such as the mean of centred values.
    THRESHOLD = 0.1234
    order: tuple[int, ...]

    def do_norm(self, x: Tensor, n: int) -> Tensor:
        return self.norms[n % 3](x)

    def do_batch_norm(self, x: Tensor, n: int) -> Tensor:
        return self.batch_norms[n % 2](x.transpose(1, 2)).transpose(1, 2)

    def do_family(self, x: Tensor, n: int) -> Tensor:
        return self.family[str(self._member(n))](x)

    def do_linear(self, x: Tensor, n: int) -> Tensor:
        return self.linears[n % 3](x)

    def do_no_bias(self, x: Tensor, n: int) -> Tensor:
        return self.linears[1](x)

    def do_matmul_weight(self, x: Tensor, n: int) -> Tensor:
        return x @ (self.weight if n % 2 else self.linears[0].weight.t())

    def do_gelu(self, x: Tensor, n: int) -> Tensor:
        return F.gelu(x)

    def do_relu(self, x: Tensor, n: int) -> Tensor:
        return F.relu(x)

    def do_neg(self, x: Tensor, n: int) -> Tensor:
        return -x

    def do_double(self, x: Tensor, n: int) -> Tensor:
        return x + x

    def do_attention(self, x: Tensor, n: int) -> Tensor:
        b, s, c = x.shape
        q, k, v = self.qkv(x).reshape(b, s, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=bool(n % 2))
        return y.transpose(1, 2).reshape(b, s, c)

    def do_conv(self, x: Tensor, n: int) -> Tensor:
        return F.pad(self.convs[0](x.transpose(1, 2)), (1, 1), mode="replicate").transpose(1, 2)

    def do_padded_conv(self, x: Tensor, n: int) -> Tensor:
        return self.convs[1](x.transpose(1, 2)).transpose(1, 2)

    def do_padded(self, x: Tensor, n: int) -> Tensor:
        return F.pad(x, (0, 0, 1, 0))[:, :-1]

    def do_gate_by_self(self, x: Tensor, n: int) -> Tensor:
        return torch.sigmoid(self.linears[n % 3](x)) * x

    def do_heads(self, x: Tensor, n: int) -> Tensor:
        b, s, c = x.shape
        return x.view(b, s, 2, c // 2).transpose(2, 3).reshape(b, s, c)

    def do_roll_channels(self, x: Tensor, n: int) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([second, first], dim=-1)

    def do_add_constant(self, x: Tensor, n: int) -> Tensor:
        return x + self.constant if n % 2 else x + 0.5

    def do_add_position(self, x: Tensor, n: int) -> Tensor:
        return x + (self.position, F.dropout(self.position, 0.1, training=False), self.position.type_as(x))[n % 3]

    def do_scale(self, x: Tensor, n: int) -> Tensor:
        return (x * self.constant, x * -0.5, x / 3.0)[n % 3]

    def do_mean_back(self, x: Tensor, n: int) -> Tensor:
        return x.mean(1, keepdim=True).expand(-1, self.LENGTH, -1)

    def do_layer_norm(self, x: Tensor, n: int) -> Tensor:
        return self.layer_norm(x)

    def do_rms_norm(self, x: Tensor, n: int) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.rms_weight if n % 2 else None, 1e-5)

    def do_masked_attention(self, x: Tensor, n: int) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        mask = (
            (x.mean(-1) > self.THRESHOLD)[:, None, None, :].to(x.dtype) * -3.0
            if n % 2
            else (x @ x.mT).unsqueeze(1) / 2.0
        )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(1)

    def do_product_attention(self, x: Tensor, n: int) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = torch.einsum("bqc,bkc->bqk", q, k) if n % 2 else q @ k.mT
        return (scores * 0.3).softmax(-1) @ v

    def do_einsum(self, x: Tensor, n: int) -> Tensor:
        return torch.einsum(("bsi,io->bso", "...i,oi->...o", "bsi,io->bso")[n % 3], x, self.weight)

    def do_per_position(self, x: Tensor, n: int) -> Tensor:
        if n % 2:
            return torch.einsum("bsi,sio->bso", x, self.per_position)
        return (x.transpose(0, 1) @ self.per_position).transpose(0, 1)

    def do_rotate(self, x: Tensor, n: int) -> Tensor:
        return x.roll((1, -1, (1, 1))[n % 3], (1, 2, (1, 2))[n % 3])

    def do_choose(self, x: Tensor, n: int) -> Tensor:
        if n % 3 == 0:
            return x.index_select(1, torch.tensor([2, 0, 1, 1]))
        return x.index_select(-1, torch.tensor(self.order)) if n % 3 == 1 else x[:, [3, 0, 0, 1]]

    def do_repeat(self, x: Tensor, n: int) -> Tensor:
        half = x.shape[-1] // 2
        return x[..., :half].repeat(1, 1, 2) if n % 2 else x[:, 1:3].repeat(1, 2, 1)

    def do_pad_channels(self, x: Tensor, n: int) -> Tensor:
        return F.pad(x, (1, -1)) if n % 2 else F.pad(x[..., 1:], (0, 1))

    def do_shuffle(self, x: Tensor, n: int) -> Tensor:
        return F.pixel_shuffle(x.unsqueeze(2), 2).reshape(x.shape)

    def do_unshuffle(self, x: Tensor, n: int) -> Tensor:
        return F.pixel_unshuffle(x.mT.unflatten(-1, (2, 2)), 2).reshape(x.shape)

    def do_resize(self, x: Tensor, n: int) -> Tensor:
        return F.interpolate(x.mT[..., 1:3], self.LENGTH, mode=("nearest", "linear")[n % 2]).mT

    def do_max_pool(self, x: Tensor, n: int) -> Tensor:
        return F.max_pool1d(x.mT, 3, 1, 1).mT if n % 2 else x - x.amax(1, keepdim=True)

    def do_average_pool(self, x: Tensor, n: int) -> Tensor:
        return F.avg_pool1d(x.mT, 3, 1, 1, count_include_pad=bool(n % 2)).mT

    def do_grouped_conv(self, x: Tensor, n: int) -> Tensor:
        return self.grouped[n % 2](x.mT).mT

    def do_transposed_conv(self, x: Tensor, n: int) -> Tensor:
        return self.transposed(x.mT).mT

    def do_glu(self, x: Tensor, n: int) -> Tensor:
        gate, up = F.silu(self.gate(x)), self.up(x)
        return self.linears[n % 3](gate * up if n % 2 else up * gate)

    def do_rotary(self, x: Tensor, n: int) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.angles.cos() + torch.cat([-second, first], dim=-1) * self.angles.sin()

    def do_fill(self, x: Tensor, n: int) -> Tensor:
        return x.masked_fill(x.mean(-1, keepdim=True) > self.THRESHOLD, float(n % 2))

    def do_flat_linear(self, x: Tensor, n: int) -> Tensor:
        return self.flat(x.flatten(1)).unflatten(-1, x.shape[1:])

    def do_centre(self, x: Tensor, n: int) -> Tensor:
        return x - x.mean((1, -1)[n % 2], keepdim=True)

    def do_absolute(self, x: Tensor, n: int) -> Tensor:
        return x.abs() if n % 2 else F.leaky_relu(x, 0.1)

    def do_positions(self, x: Tensor, n: int) -> Tensor:
        return self.per_position[:, :, 0].mT[: self.LENGTH, :2].tanh() @ x[:, :2] if x.shape[-1] >= 4 else x

    def do_cross_attention(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        q, k, v = self.linears[0](x), self.linears[n % 3](y), self.up(y)
        return F.scaled_dot_product_attention(q, k, v)

    def do_gated(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        return torch.sigmoid(x) * y if n % 2 else y / (1 + torch.sigmoid(x))

    def do_join(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        return torch.cat([x[..., :1], y[..., 1:]], dim=-1) if n % 2 else torch.cat([x[:, 1:], y[:, :1]], dim=1)

    def do_add_first(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        return x + y[:, :1] if n % 2 else y[..., :1] - x

    def do_stack(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        half = x.shape[-1] // 2
        return torch.stack([x[..., :half], y[..., half:]], -1).flatten(-2)

    def do_weigh(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        return x * y.mean(-1, keepdim=True) if n % 2 else y[:, :1].tanh() * x

    def do_mixture(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        return (x @ x.mT / 4.0) @ y if n % 2 else torch.bmm(x.softmax(1).mT.mT @ x.mT, y)

    def do_written_rms_norm(self, x: Tensor, n: int) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if n == 2 else x
        return self.rms_weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    def do_add(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        return x + y

    def do_sub(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        return x - y

    def do_mul(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        return x * torch.tanh(y)

    def do_concat_channels(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        return self.wide[n % 2](torch.cat([x, y], dim=-1))

    def do_concat_positions(self, x: Tensor, y: Tensor, n: int) -> Tensor:
        token = self.token.expand(x.shape[0], -1, -1)
        return torch.cat([token, x[:, :1], y[:, 2:]], dim=1)

    def do_experts(self, x: Tensor, n: int) -> Tensor:
        if n % 2:
            return torch.einsum("bsi,sio,bs->bso", x, self.per_position, torch.tanh(x.mean(-1)))
        return torch.einsum("bqk,bki,io->bqo", (x @ x.mT * 0.1).softmax(-1), x, self.per_position[0])

    def do_turn(self, x: Tensor, n: int) -> Tensor:
        return x.rot90(2, ((0, 1), (1, 2), (0, 2))[n % 3]) if n % 2 else x.rot90(n + 1, (0, 1)).rot90(-n - 1, (0, 1))

    def do_differences(self, x: Tensor, n: int) -> Tensor:
        axis = 1 + n % 2
        return torch.cat([x.narrow(axis, 0, 1), x.diff(dim=axis)], axis)

    def do_power(self, x: Tensor, n: int) -> Tensor:
        return F.relu(x).square() if n % 2 else F.relu(x).clamp(max=2.0) ** 1.5

    def do_quantile(self, x: Tensor, n: int) -> Tensor:
        if n % 2:
            return x.quantile(0.3, 1, keepdim=True).expand_as(x)
        return x.repeat_interleave(torch.tensor(COUNTS), 1, output_size=self.LENGTH)

    def do_channel_mask(self, x: Tensor, n: int) -> Tensor:
        return x * (self.constant > 0) if n % 2 else x * torch.floor(self.constant * 3)

    def do_shares(self, x: Tensor, n: int) -> Tensor:
        weights = torch.exp((x @ x.mT).tanh())
        weights = weights / weights.sum(-1, keepdim=True)
        return weights @ x if n % 2 else (x.mT @ weights.mT).mT
