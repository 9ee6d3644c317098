"""The .proto files and the code generated from them: all that agent and controller share. Contains no logic."""
