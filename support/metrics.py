"""What compares the features of two sets of images: pure functions."""

from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric


def scores(judged, labels, real, args):
    """What `judged`, a judge's (features, logits) of images asked for as `labels`, is worth beside the `real` features.

    Frechet distance; with the classifier the share of images given their own label; Inception Score, precision and recall of the
    Inception features where `args` asks for them. Computed by torch-fidelity.
    """
    features, logits = judged
    statistics = [fid_features_to_statistics(part.double()) for part in (features, real)]
    result = {"images": len(features), "frechet_distance": fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]}
    if args.features == "classifier":
        result["own_label"] = (logits.argmax(1) == labels.cpu()).float().mean().item()
    if args.inception_score:
        result["inception_score"] = isc_features_to_metric(logits)[KEY_METRIC_ISC_MEAN]
    if args.precision_recall:
        metric = prc_features_to_metric(features, real, verbose=False, save_cpu_ram=True)  # 50,000 squared would not fit
        result |= {"precision": metric[KEY_METRIC_PRECISION], "recall": metric[KEY_METRIC_RECALL]}
    return result
