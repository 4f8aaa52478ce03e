mkdir -p d/sub; echo shared > d/one; ln d/one d/two; ln d/one d/sub/three; echo alone > d/alone
