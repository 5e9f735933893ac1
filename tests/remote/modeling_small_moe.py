"""A model as remote code ships it: attention, a dense layer, and experts that are modules.

Written for the tests and for docs/models.md. With ``dispatch`` "sorted" its layers work as those of
the first DeepSeek-MoE, with "looped" as those of Phi-3.5-MoE and early Mixtral.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput


class SmallMoeConfig(PreTrainedConfig):
    model_type = "small_moe"

    def __init__(
        self,
        vocab_size=260,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=3,
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        dispatch="sorted",
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_hidden_layers = num_hidden_layers
        self.moe_intermediate_size = moe_intermediate_size
        self.n_routed_experts = n_routed_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.dispatch = dispatch
        super().__init__(**kwargs)


class Expert(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.moe_intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.moe_intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.moe_intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.n_routed_experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        scores = functional.linear(flat, self.weight).softmax(dim=-1)
        weight, ids = torch.topk(scores, self.top_k, dim=-1, sorted=False)
        return ids, weight, None  # the last is a loss in training


class SortedMoe(nn.Module):
    """The gate says ids and weights; each expert gets its tokens, sorted together."""

    def __init__(self, config):
        super().__init__()
        self.gate = Gate(config)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.n_routed_experts))
        self.shared_experts = Expert(config)

    def forward(self, hidden):
        ids, weight, _ = self.gate(hidden=hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        order = ids.reshape(-1).argsort()
        ends = ids.reshape(-1).bincount(minlength=len(self.experts)).cumsum(0).tolist()
        total, start = torch.zeros_like(flat), 0
        for expert, end in zip(self.experts, ends, strict=True):
            if end > start:
                chosen = order[start:end]
                token = chosen // ids.shape[1]
                out = expert(flat[token])
                out.mul_(weight.reshape(-1, 1)[chosen])
                total.index_add_(0, token, out)
            start = end
        return total.view_as(hidden) + self.shared_experts(hidden)


class LoopedMoe(nn.Module):
    """The gate is a linear layer; the block chooses, and goes through all experts."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.experts = nn.ModuleList(Expert(config) for _ in range(config.n_routed_experts))

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        weight, ids = self.gate(flat).softmax(dim=-1).topk(self.top_k, dim=-1)
        weight = weight / weight.sum(dim=-1, keepdim=True)
        mask = functional.one_hot(ids, num_classes=self.num_experts).permute(2, 1, 0)
        total = torch.zeros_like(flat)
        for number in range(self.num_experts):
            slot, token = torch.where(mask[number])
            out = self.experts[number](flat[token]) * weight[token, slot, None]
            total.index_add_(0, token, out)
        return total.view_as(hidden)


class Layer(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.n_heads = config.num_attention_heads
        self.norms = nn.ModuleList(nn.RMSNorm(config.hidden_size, eps=1e-6) for _ in range(2))
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        moe = SortedMoe if config.dispatch == "sorted" else LoopedMoe
        self.mlp = moe(config) if number > 0 else Expert(config)

    def forward(self, x, mask):
        normed = self.norms[0](x)
        parts = self.qkv(normed).chunk(3, dim=-1)
        heads = [part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in parts]
        mixed = functional.scaled_dot_product_attention(*heads, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norms[1](x))


class SmallMoeForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = SmallMoeConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = (Layer(config, number) for number in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **_kwargs):
        x = self.embed(input_ids)
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        if attention_mask is not None:
            real = attention_mask.bool()[:, None, None, :]
            mask = (mask & real) | torch.eye(length, dtype=torch.bool, device=x.device)
        for layer in self.layers:
            x = layer(x, mask)
        return CausalLMOutput(logits=self.lm_head(self.norm(x)))
