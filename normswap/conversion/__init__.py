"""The story of a conversion: survey, evidence, plan, replace, calibrate, drift; read `pipeline` first."""
