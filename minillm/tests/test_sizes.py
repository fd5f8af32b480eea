"""The sizes of the model."""
import pytest

from minillm import sizes


def test_sizes(monkeypatch):
    monkeypatch.setenv("MINILLM_SIZE", "medium")
    assert sizes.chosen() == "medium"
    cpu, medium = sizes.SIZES["cpu"], sizes.SIZES["medium"]
    assert medium.stories.model.dim == medium.files.model.dim == 288 and medium.files.model.vocab_size == cpu.files.model.vocab_size
    assert (medium.chat.training.lr, medium.lora) == (2.5e-3, cpu.lora) and medium.chat.examples == cpu.chat.examples
    monkeypatch.setenv("MINILLM_SIZE", "large")
    with pytest.raises(ValueError, match="MINILLM_SIZE=large: there are the sizes cpu, medium"):
        sizes.chosen()
