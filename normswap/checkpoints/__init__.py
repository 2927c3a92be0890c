"""Files and folders that hold models, in every format; nothing here knows of conversion."""
