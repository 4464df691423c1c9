"""Files of `<dir>/compare/` beside the verdict: the paper's view of specific latents by category, the demo's truth."""

STATISTICS = "statistics.json"
STATISTICS_SCHEMA = 1
TRUTH_SCHEMA = 1
