"""The HTTP client for SGLang, and the server processes that the trainer starts and stops by pid."""
