"""megachat trains nanochat's GPT to GPT-2 capability, on a laptop CPU or many nodes, with equal results."""
