"""megachat: nanochat's GPT trained to GPT-2 capability, on one laptop CPU or many nodes, with equal results on every layout."""
