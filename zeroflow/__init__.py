"""zeroflow: raw web text to a trained, checked and comparable LLaMA-style language model."""
