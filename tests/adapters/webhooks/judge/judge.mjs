// Judges signed requests: a JSON list on stdin, a JSON list of verdicts (true, or why not) on stdout.
// v1 by the published library of Standard Webhooks, v1a by the Ed25519 of node itself.
import { createPublicKey, verify } from "node:crypto";
import { text } from "node:stream/consumers";
import { Webhook } from "standardwebhooks";

// What stands in front of the 32 bytes of an Ed25519 key in DER (RFC 8410).
const DER = Buffer.from("302a300506032b6570032100", "hex");

function v1({ secret, headers, body }) {
  new Webhook(secret).verify(body, headers);
}

function v1a({ secret, headers, body }) {
  const raw = Buffer.from(secret.replace("whpk_", ""), "base64");
  const key = createPublicKey({ key: Buffer.concat([DER, raw]), format: "der", type: "spki" });
  const content = `${headers["webhook-id"]}.${headers["webhook-timestamp"]}.${body}`;
  const signatures = headers["webhook-signature"].split(" ").filter((one) => one.startsWith("v1a,"));
  const holds = (one) => verify(null, Buffer.from(content), key, Buffer.from(one.slice(4), "base64"));
  if (!signatures.some(holds)) throw new Error("No matching signature found");
}

const verdicts = JSON.parse(await text(process.stdin)).map((request) => {
  try {
    (request.secret.startsWith("whpk_") ? v1a : v1)(request);
    return true;
  } catch (error) {
    return error.message;
  }
});
process.stdout.write(JSON.stringify(verdicts));
