"""Teacher scores of the student's tokens, from a Megatron model in the job or from an SGLang server."""
