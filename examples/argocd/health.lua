-- Health of the kinds of virtfleece.io, for Argo CD: argocd-cm.yaml beside this file holds a copy.
-- A backup is healthy when it is complete, a repository when it is ready.
local health = { status = "Progressing", message = "virt-fleece has not seen it yet" }

if obj.metadata.deletionTimestamp ~= nil then
  health.message = "being deleted"
  return health
end
if obj.status == nil or obj.status.conditions == nil then
  return health
end
-- What the status says is about an earlier spec.
if obj.status.observedGeneration ~= nil and obj.metadata.generation ~= nil
    and obj.status.observedGeneration ~= obj.metadata.generation then
  health.message = "the spec has changed"
  return health
end

local is = {}
for _, condition in ipairs(obj.status.conditions) do
  is[condition.type] = condition
end
local function holds(kind, value)
  return is[kind] ~= nil and is[kind].status == value
end
local function text(condition)
  if condition.message ~= nil and condition.message ~= "" then
    return condition.reason .. ": " .. condition.message
  end
  return condition.reason
end

if holds("Failed", "True") then
  health.status = "Degraded"
  health.message = text(is.Failed)
elseif holds("Stalled", "True") then
  health.status = "Degraded"
  health.message = text(is.Stalled)
elseif holds("Reachable", "False") then
  health.status = "Degraded"
  health.message = text(is.Reachable)
elseif holds("Ready", "True") then
  health.status = "Healthy"
  health.message = text(is.Ready)
elseif is.Ready ~= nil then
  health.message = text(is.Ready)
  if obj.status.phase ~= nil then
    health.message = obj.status.phase .. ", " .. health.message
  end
  if obj.status.progress ~= nil then
    health.message = health.message .. " (" .. obj.status.progress .. ")"
  end
end
return health
