"""What the teacher says of the student's tokens: a Megatron model in the job, or an SGLang server."""
