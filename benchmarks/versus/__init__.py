"""Parts of `benchmarks.versus_trl`: whole training runs of this project beside those of another trainer."""
