"""Other libraries' integrators on the processes of a denoiser; each is imported when it is used."""
