def batches(data):
    return list(data)
