"""Tests that every sharding of ranks passes, at each of its ZeRO stages."""

from ranks import SAVED, STEPS, close, loaded, trained

from zeroflow.training.config import TrainingConfig


class TrainsLikeOneProcess:
    """Uses the fixtures `alone`, `together`, `config` and `folder`, and the parameter `stage`."""

    def test_losses_norms_and_updates_match_one_process(self, alone, together, stage):
        for rank in together:
            for name in ("before", "continued"):
                assert rank[stage][name] == close(alone[name]), name

    def test_resume_from_a_checkpoint_is_bit_exact(self, together, stage):
        assert together[0][stage]["resumed"] == together[0][stage]["continued"]

    def test_ranks_resume_from_one_process_and_one_process_from_ranks(
        self, alone, together, config: TrainingConfig, folder, stage
    ):
        assert together[0][stage]["from one process"] == close(alone["continued"])
        state = loaded(config, folder / f"stage{stage}")
        assert trained(state, config, STEPS - SAVED) == close(alone["continued"])

    def test_nan_loss_of_one_rank_leaves_the_weights_of_all_ranks_unchanged(self, together, stage):
        for rank in together:
            assert rank[stage]["skipped"] == [True, [1, 1], False]
