"""The training job: what each part made elsewhere is put in order here."""
