import math

import numpy as np
import pytest
import torch

from newllm_lib import evaluation
from newllm_lib.config import ModelConfig
from newllm_lib.data.dataset import Split
from newllm_lib.evaluation import MetricSums, copied_to, evaluate_split
from newllm_lib.model.newllm import NewLLM
from newllm_lib.system.hardware import Precision


def test_perplexity_is_weighted_by_tokens_with_literal_values():
    sums = MetricSums()
    sums.add(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, False]), torch.tensor([1, 5, 6]))
    sums.add(torch.tensor([4.0]), torch.tensor([True]), torch.tensor([7]))
    result = sums.result()
    assert result.loss == 2.5  # 10 / 4, where a mean of batch means would give 3
    assert result.perplexity == pytest.approx(12.182494)
    assert result.accuracy == 0.5
    assert result.loss_known == 3.0  # without the target 1, <UNK>
    assert result.perplexity_known == pytest.approx(20.085537)
    assert result.accuracy_known == pytest.approx(1 / 3)
    assert result.unknown_share == 0.25
    assert result.tokens == 4


def test_only_unknown_targets_leave_no_known_perplexity():
    sums = MetricSums()
    sums.add(torch.tensor([1.0]), torch.tensor([True]), torch.tensor([1]))
    assert math.isnan(sums.result().perplexity_known)


def test_an_enormous_loss_is_an_infinite_perplexity():
    assert evaluation.perplexity(1e6, 1) == math.inf


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_put_back_after_an_exception(training):
    def stops(*_args):
        raise KeyboardInterrupt

    model = NewLLM(ModelConfig(vocab_size=6, hidden_dim=8)).train(training)
    split = Split(np.array([[2, 4, 5, 3]], dtype=np.int32), carries_context=False)
    with pytest.raises(KeyboardInterrupt):
        evaluate_split(model, split, precision=Precision("fp32", ""), engine=stops)
    assert model.training is training


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no token to score"):
        MetricSums().result()


def test_a_copy_is_scored_elsewhere_and_the_model_stays():
    model = NewLLM(ModelConfig(vocab_size=10, hidden_dim=8))
    with copied_to(model, "cpu") as there:
        assert there is model
    with copied_to(model, "meta") as there:
        assert there.device.type == "meta" and there is not model
        assert model.device.type == "cpu"
