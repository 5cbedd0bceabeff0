"""nanochat's GPT as embed, blocks and head with an explicit stream between them. Knows nothing of distribution."""
