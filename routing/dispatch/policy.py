"""What the choice between copies takes for granted."""

EXPERT_COST_ROWS = 8
"""What an expert costs beside its tokens, in token rows: its weights are read once whatever the batch. Measured with
vLLM's CPU kernel in float32, where reading 12 bytes takes about as long as 8 to 10 rows of arithmetic on them."""
