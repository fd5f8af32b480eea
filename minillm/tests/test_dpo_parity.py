"""The losses of preference tuning held against the code of trl's own trainers."""
import math
import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from minillm.dpo import dpo_loss, ipo_loss, kto_loss, orpo_loss, sequence_logprob
from minillm.tests.test_dpo import batch, logprobs, ragged, tiny


def transformers_copy(model):
    """The model in transformers, with the head that trl's trainers put on it."""
    from transformers import LlamaConfig as Config, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    c = model.config
    copy = LlamaForCausalLM(Config(
        vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
        intermediate_size=c.hidden_dim, rms_norm_eps=c.norm_eps,
        max_position_embeddings=c.max_seq_len, bos_token_id=None, eos_token_id=None))

    copy.load_state_dict(model.state_dict())
    add_fused_lm_head(copy, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return copy.eval()


def same(z):
    """What stands for gathering from all processes, where there is one."""
    return z


ACCELERATOR = SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)


def trl_dpo(rows, policy, reference, beta, kind="sigmoid"):
    """Loss and metrics of trl's DPOTrainer.

    With its own collator and its own log-probabilities of transformers' models.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")          # about progress bars and names that will change
        from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

        policy, reference = transformers_copy(policy), transformers_copy(reference)
        # what _compute_loss reads; a whole trainer wants a tokenizer, a data set and a folder
        trainer = SimpleNamespace(
            model=policy, ref_model=reference, accelerator=ACCELERATOR, beta=beta,
            loss_types=[kind], loss_weights=[1.0], f_divergence_type="reverse_kl", ld_alpha=None,
            label_smoothing=0.0, use_weighting=False, aux_loss_enabled=False,
            precompute_ref_logps=False, args=SimpleNamespace(gradient_checkpointing_kwargs=None),
            _metrics={"eval": defaultdict(list)}, _total_train_tokens=0, _tp_size=1)
        collated = DataCollatorForPreference(pad_token_id=7)(rows)
        loss = DPOTrainer._compute_loss(trainer, policy, collated, return_outputs=False)
    return loss, {name: values[0] for name, values in trainer._metrics["eval"].items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", (0.05, 0.5))
def test_sequence_logprob_and_dpo_loss_equal_trl(seed, beta):
    rows, policy, reference = ragged(seed), tiny(seed), tiny(seed + 100)
    p, r, _ = logprobs(rows, policy, reference)
    loss, metrics = trl_dpo(rows, policy, reference, beta)
    assert torch.isclose(dpo_loss(*p.chunk(2), *r.chunk(2), beta), loss, atol=1e-4)
    chosen, rejected = p.chunk(2)
    assert math.isclose(metrics["logps/chosen"], chosen.mean(), abs_tol=1e-3)
    assert math.isclose(metrics["logps/rejected"], rejected.mean(), abs_tol=1e-3)


def test_each_sequence_logprob_equals_trl():
    """One pair at a time, so that its mean over the batch is the number itself."""
    rows, policy = ragged(5), tiny(5)
    ids, mask = batch(rows)
    with torch.no_grad():
        ours = sequence_logprob(policy, ids, mask).chunk(2)
    for i, row in enumerate(rows):
        _, metrics = trl_dpo([row], policy, policy, 0.1)
        for z, side in zip(ours, ("chosen", "rejected")):
            assert math.isclose(metrics[f"logps/{side}"], z[i], abs_tol=1e-4)


def test_ipo_equals_trl_given_means_per_token():
    """trl divides each log-ratio by the length of its answer, which the paper's text does not."""
    rows, policy, reference = ragged(1), tiny(1), tiny(2)
    p, r, n = logprobs(rows, policy, reference)
    loss, _ = trl_dpo(rows, policy, reference, 0.2, "ipo")
    assert torch.isclose(ipo_loss(*(p / n).chunk(2), *(r / n).chunk(2), 0.2), loss, atol=1e-4)


def test_kto_equals_trl_given_the_same_zero():
    from trl.trainer.kto_trainer import KTOTrainer

    rows, policy, reference = ragged(2), tiny(2), tiny(3)
    p, r, _ = logprobs(rows, policy, reference)
    ids, mask = batch(rows)
    policy, reference = transformers_copy(policy), transformers_copy(reference)
    trainer = SimpleNamespace(
        model=policy, ref_model=reference, accelerator=ACCELERATOR, beta=0.3, loss_type="kto",
        aux_loss_enabled=False, precompute_ref_logps=False, calculate_KL=True,
        desirable_weight=1.0, undesirable_weight=1.0,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        _compute_kl_logps=lambda model, _: p if model is policy else r)
    half = len(rows)
    inputs = {"input_ids": ids, "completion_mask": mask.long(),
              "attention_mask": torch.ones_like(ids),
              "label": torch.tensor([True] * half + [False] * half)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = KTOTrainer._compute_loss(trainer, policy, inputs, return_outputs=False)
    assert torch.isclose(kto_loss(*p.chunk(2), *r.chunk(2), 0.3), loss, atol=1e-4)


def test_orpo_equals_trl():
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    rows, policy = ragged(4), tiny(4)
    p, _, n = logprobs(rows, policy, policy)
    ids, mask = batch(rows)
    with torch.no_grad():
        labels = ids.masked_fill(~mask, -100)
        means = ORPOTrainer.get_batch_logps(policy(ids), labels, average_log_prob=True)
    assert torch.allclose(means, p / n, atol=1e-4)
    trainer = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    odds, *_ = ORPOTrainer.odds_ratio_loss(trainer, *means.chunk(2))
    expected = (-means.chunk(2)[0] - odds).mean()
    assert torch.isclose(orpo_loss(*p.chunk(2), *n.chunk(2), 0.4), expected, atol=1e-4)
