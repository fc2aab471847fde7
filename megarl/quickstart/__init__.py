"""The whole course on one machine, from made-up data to a verified Hugging Face checkpoint: `bash launch/quickstart.sh`."""
