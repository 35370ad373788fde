"""The HTTP client of SGLang and the server processes that we start and stop by pid."""
