"""Looking at runs: tables, pages, comparisons, ablations. Nothing below imports it."""
